"""What happens to an adapter after training."""
