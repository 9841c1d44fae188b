"""The maths: the model, ring attention, packing and loss. Needs torch alone."""
