"""Prompts -> embeddings, by kind of text encoder."""
