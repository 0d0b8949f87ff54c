"""What each step does: plain typed functions that run without an orchestrator."""
