"""The `fedqueue` command: one file per noun. It reads settings, opens what is needed, calls, and prints."""
