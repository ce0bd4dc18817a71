//! Tests of the wanted set.
