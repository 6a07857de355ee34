"""Preference data: reading it, generating it, and corrupting it on purpose."""
