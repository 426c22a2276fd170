"""Published weights, in and out: tables of names and layouts, and one engine that reads them in both directions."""
