"""Rows as files have them: tables, archives and folders, their layouts, and what a row of each means."""
