"""A run: arguments, folder, lease, plan, log, summary."""
