"""What runs, in what order, with which retries, caching and limits."""
