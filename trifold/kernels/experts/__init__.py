"""All experts of a mixture at once: one product over the tokens of all of them."""
