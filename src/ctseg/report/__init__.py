"""What people read after a run: figures and tables."""
