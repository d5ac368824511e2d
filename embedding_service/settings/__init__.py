"""The settings: declared, and read from the environment and `.env`."""
