"""Weight-only products: x in its own dtype, the weight packed."""
