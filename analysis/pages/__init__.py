"""What all our pages share: the template environment, charts, CSS and script."""
