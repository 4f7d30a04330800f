package awskms_test

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kmsfs/keystore"
	"kmsfs/keystore/awskms"
	"kmsfs/keystore/keystoretest"
)

// Of a multi-Region key the own Region's replica is used, if there is one.
func TestOwnRegionFirst(t *testing.T) {
	srv := keystoretest.NewServer(t)
	here := srv.AddMultiRegion()
	there := strings.Replace(here, keystoretest.Region, "us-east-1", 1)
	c := awskms.New(quick)
	if s, err := c.OpenURI(t.Context(), "aws-kms:"+there); err != nil || s.ARN() != here ||
		!s.Matches("aws-kms:"+there) {
		t.Errorf("%v, %v", s, err)
	}
	// It has a policy of its own.
	s, err := c.OpenURI(t.Context(), "aws-kms:"+there)
	if err != nil {
		t.Fatal(err)
	}
	_, w, err := s.Generate(t.Context(), fileKey)
	if err != nil || w.URI != "aws-kms:"+here {
		t.Fatal(w.URI, err)
	}
	srv.DenyARN(here)
	if _, err := s.Unwrap(t.Context(), fileKey, w); keystore.KindOf(err) != keystore.Denied {
		t.Errorf("the right to the replica that was used is taken away: %v", err)
	}
	if s, err = c.OpenURI(t.Context(), "aws-kms:"+there); err != nil {
		t.Fatal(err)
	}
	before := srv.Calls("Decrypt")
	for range 3 {
		if _, err := s.Unwrap(t.Context(), fileKey, w); err != nil {
			t.Errorf("the replica here may not be used: %v", err)
		}
	}
	if n := srv.Calls("Decrypt") - before; n != 4 && n != 5 { // one denial, perhaps looked at twice
		t.Errorf("%d calls", n)
	}
	srv.DenyARN("")
	srv.Deny("DescribeKey") // it cannot be seen
	if s, err := c.OpenURI(t.Context(), "aws-kms:"+there); err != nil || s.ARN() != there {
		t.Errorf("%v, %v", s, err)
	}
	srv.Deny()
	none := strings.Replace(srv.AddKey(""), keystoretest.Region, "us-east-1", 1)
	if s, err := c.OpenURI(t.Context(), "aws-kms:"+none); err != nil || s.ARN() != none {
		t.Errorf("a key of one Region: %v, %v", s, err)
	}
}

// regions is a store of a multi-Region key, under its replica far away, with a server.
func regions(t *testing.T) (srv *keystoretest.Server, s *awskms.Store, here, there string) {
	srv = keystoretest.NewServer(t)
	here = srv.AddMultiRegion()
	there = strings.Replace(here, keystoretest.Region, farRegion, 1)
	s, err := awskms.New(awskms.Options{Attempt: time.Second,
		Total: time.Second}).OpenURI(t.Context(), "aws-kms:"+there)
	if err != nil || s.ARN() != here {
		t.Fatal(s, err)
	}
	return srv, s, here, there
}

const farRegion = "us-east-1"

// If the own Region is away the replica that was named is asked, until that one is
// away or the Region is back; verdicts are the own one's.
func TestRegionAway(t *testing.T) {
	srv, s, here, there := regions(t)
	const own, far = keystoretest.Region, farRegion
	asked := func(what string, want keystore.Kind, regions ...string) {
		t.Helper()
		before := map[string]int{own: srv.Calls("in " + own), far: srv.Calls("in " + far)}
		if _, _, err := s.Generate(t.Context(), fileKey); keystore.KindOf(err) != want {
			t.Errorf("%s: %v", what, err)
		}
		for region, n := range before {
			if is := srv.Calls("in "+region) > n; is != slices.Contains(regions, region) {
				t.Errorf("%s: asked in %s: %v", what, region, is)
			}
		}
	}
	asked("at first", 0, own)
	srv.SetAway(own)
	asked("when it goes away", keystore.Outage, own)
	asked("while it is away", 0, far)
	srv.SetAway("")
	asked("just after it is back", 0, far)
	srv.SetAway(far)
	asked("the other one goes away", keystore.Outage, far)
	asked("then", 0, own)
	srv.SetAway(own)
	asked("away once more", keystore.Outage, own)
	asked("the other one was away too", keystore.Outage, own)
	awskms.LongAgo(s)
	asked("a while later", keystore.Outage, own)
	asked("then", 0, far)
	awskms.LongAgo(s)
	asked("still away after a while", 0, own, far)
	asked("then", 0, far)
	srv.SetAway("")
	awskms.LongAgo(s)
	asked("back after a while", 0, own)
	asked("then", 0, own)

	// The named one's verdicts do not count, also where it has helped before.
	for _, state := range []string{"denied", "once more"} {
		srv.SetAway(own)
		asked(state+", the own one away", keystore.Outage, own)
		srv.DenyARN(there)
		asked(state, keystore.Outage, far, own)
		srv.SetAway("")
		asked(state+", the own one back", 0, far, own)
		asked(state+", then", 0, own)
		srv.DenyARN("")
	}

	// A call that is throttled says nothing of the Region, nor does one that failed while
	// others were answered.
	srv.Fail(func(string) *keystoretest.Failure {
		return &keystoretest.Failure{Status: 400, Code: "ThrottlingException"}
	})
	asked("throttled", keystore.Outage, own)
	srv.Fail(nil)
	asked("then", 0, own)
	_, w, err := s.Generate(t.Context(), fileKey)
	if err != nil {
		t.Fatal(err)
	}
	srv.Fail(func(op string) *keystoretest.Failure {
		if op == "Decrypt" {
			return &keystoretest.Failure{Status: 503}
		}
		return nil
	})
	unlucky := make(chan error)
	go func() {
		_, err := s.Unwrap(t.Context(), fileKey, w)
		unlucky <- err
	}()
	for srv.Calls("Decrypt") == 0 {
		time.Sleep(time.Millisecond)
	}
	asked("beside one that fails", 0, own)
	if err := <-unlucky; keystore.KindOf(err) != keystore.Outage {
		t.Errorf("unlucky: %v", err)
	}
	asked("then", 0, own)
	srv.Fail(nil)

	// Its answer when it is back counts.
	srv.SetAway(own)
	asked("and away", keystore.Outage, own)
	srv.SetAway("")
	awskms.LongAgo(s)
	srv.DenyARN(here)
	asked("and back, but forbidden", keystore.Denied, own)
	asked("then", keystore.Denied, own)
}

// If the own replica may not be used, and its Region is away at first, the named one
// is for good.
func TestRegionAwayAndForbidden(t *testing.T) {
	srv, s, here, _ := regions(t)
	srv.DenyARN(here)
	srv.SetAway(keystoretest.Region)
	for i, want := range []keystore.Kind{keystore.Outage, 0, 0, 0, 0} {
		if i == 3 {
			srv.SetAway("")
		}
		if i > 1 {
			awskms.LongAgo(s)
		}
		if _, _, err := s.Generate(t.Context(), fileKey); keystore.KindOf(err) != want {
			t.Errorf("call %d: %v", i, err)
		}
	}
}

// Calls at once, while the Regions come and go, fail by an outage or not at all.
func TestRegionsComeAndGo(t *testing.T) {
	srv, s, _, there := regions(t)
	srv.DenyARN(there)
	if _, _, err := s.Generate(t.Context(), fileKey); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 32 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, _, err := s.Generate(t.Context(), fileKey); err != nil &&
					keystore.KindOf(err) != keystore.Outage {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range 6 {
		srv.SetAway([]string{keystoretest.Region, "", farRegion}[i%3])
		awskms.LongAgo(s)
		time.Sleep(500 * time.Millisecond)
	}
	close(stop)
	wg.Wait()
	srv.SetAway("")
	awskms.LongAgo(s)
	for range 2 { // perhaps the Region was away just now
		if _, _, err := s.Generate(t.Context(), fileKey); err != nil {
			t.Errorf("all is well again: %v", err)
		}
	}
}
