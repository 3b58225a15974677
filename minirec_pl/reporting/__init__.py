"""Pictures, the HTML report, and what goes to W&B."""
