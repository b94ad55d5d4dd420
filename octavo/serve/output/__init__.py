"""What is sent: the choices of a request as one value, how each route writes them, and how they go out."""
