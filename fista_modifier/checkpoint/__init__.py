"""What is on disk: the report beside a checkpoint, and its verification."""
