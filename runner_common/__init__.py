"""Code shared by client and server, importing neither."""
