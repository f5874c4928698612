"""The shared engine: every command ends here."""
