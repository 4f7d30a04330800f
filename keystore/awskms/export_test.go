package awskms

import "time"

// LongAway makes it long ago that the store's Region was found to be away.
func LongAway(s *Store) {
	s.route.mu.Lock()
	defer s.route.mu.Unlock()
	s.route.away = time.Now().Add(-2 * homeAgain)
}
