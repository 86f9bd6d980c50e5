"""What the commands share: options, access to a runner, output, exit codes."""
