"""What one Parquet file says: its types, its footer, how its pages are decoded and compared."""
