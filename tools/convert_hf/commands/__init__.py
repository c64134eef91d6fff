"""One module for each verb, and what the converting verbs print and write beside the weights."""
