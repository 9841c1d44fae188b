"""`ringworld serve`: an OpenAI-compatible endpoint over a ring, on Ray Serve."""
