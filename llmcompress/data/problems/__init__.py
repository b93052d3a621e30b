"""Problems with exact checkers: what a model solves, verifies and corrects."""
