"""The ground that everything stands on: nothing here knows what a build is."""
