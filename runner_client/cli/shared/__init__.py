"""Code shared by the commands: options, access to a runner, output and exit codes."""
