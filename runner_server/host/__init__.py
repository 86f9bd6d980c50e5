"""The machine and the process: memory, folders, compilers and the parent process."""
