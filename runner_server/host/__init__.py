"""The server's machine and process: memory, heap, folders, compiler, BLAS and parent process."""
