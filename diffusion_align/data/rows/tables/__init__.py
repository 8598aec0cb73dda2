"""Rows of tables: parquet, arrow, JSON, CSV and lines of text, in any encoding and under other names of columns."""
