"""Speed on one device."""
