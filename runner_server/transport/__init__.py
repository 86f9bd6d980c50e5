"""Translation of failures to the statuses of the error table."""
