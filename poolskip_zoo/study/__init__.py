"""The study of whether Pool Skip helps: its networks, statistics and pictures. Importing it registers the networks."""

from . import nets as nets
