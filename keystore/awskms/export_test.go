package awskms

import "time"

// LongAway makes it long ago that the store's Region was found to be away.
func LongAway(s *Store) {
	t := time.Now().Add(-2 * homeAgain)
	s.away.Store(&t)
}
