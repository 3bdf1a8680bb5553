"""One model that people talk with: in a page, through an endpoint, or in a terminal."""
