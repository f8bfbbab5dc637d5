"""What each query block reads, and how finely."""
