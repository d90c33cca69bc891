"""What is computed from states on request, and never carried in them."""
