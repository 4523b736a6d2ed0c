"""Evaluation: loss of a text, LAMBADA and HellaSwag, classes of texts, responses to instructions."""
