"""Commands about models without a runner: memory and download."""
