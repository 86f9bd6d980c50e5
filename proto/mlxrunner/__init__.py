"""What a runner and its clients agree on: messages, the ready line, and free memory."""
