package awskms

import "time"

// LongAgo makes it long ago that a Region was found to be away.
func LongAgo(s *Store) {
	s.route.mu.Lock()
	defer s.route.mu.Unlock()
	s.route.alone = time.Time{}
	if !s.route.away.IsZero() {
		s.route.away = time.Now().Add(-2 * homeAgain)
	}
}
