"""What tenants use, and how much they may."""
