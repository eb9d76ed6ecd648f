"""Text: from prompts to token ids, and from those to the states that a text model attends to."""
