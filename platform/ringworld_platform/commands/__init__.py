"""The commands of `ringworld`, by subject; what is heavy to import is imported when one runs."""
