"""What is on disk: a checkpoint's files and formats, its report and verification."""
