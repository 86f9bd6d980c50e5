"""What client and server share: plain modules that import neither of them."""
