"""What we claim, drawn and measured from runs."""
