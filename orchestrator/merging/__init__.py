"""Merge tasks to receipts, receipts to finished points."""
