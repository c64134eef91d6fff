"""One module per verb, and what the converting verbs print and write alongside the weights."""
