"""scikit-learn's face: estimators of arrays and of lakes, and a grid of them."""
