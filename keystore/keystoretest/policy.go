package keystoretest

import (
	"encoding/json"
	"slices"
	"strings"
)

// policy is a key policy as far as documents of this project use one: Allow statements with
// principals, actions, and conditions on the encryption context.
type policy struct {
	Statement []struct {
		Effect    string
		Principal struct{ AWS list }
		Action    list
		Condition struct {
			StringEquals map[string]list
		}
	}
}

// list is a JSON string, or an array of them.
type list []string

// UnmarshalJSON implements [json.Unmarshaler].
func (l *list) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*l = list{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(l))
}

// allows reports whether a statement lets the principal make the call. A condition that is not
// about the encryption context lets nobody.
func (p *policy) allows(who, action string, context map[string]string) bool {
	for _, s := range p.Statement {
		ok := s.Effect == "Allow" && slices.Contains(s.Principal.AWS, who) &&
			slices.Contains(s.Action, action)
		for key, values := range s.Condition.StringEquals {
			name, about := strings.CutPrefix(key, "kms:EncryptionContext:")
			ok = ok && about && slices.Contains(values, context[name])
		}
		if ok {
			return true
		}
	}
	return false
}

// SetPolicy makes every key have this policy, given as JSON, and says which principal each
// access key ID is. An empty one allows all.
func (s *Server) SetPolicy(text string, roles map[string]string) error {
	var p *policy
	if text != "" {
		p = &policy{}
		if err := json.Unmarshal([]byte(text), p); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.policy, s.roles = p, roles
	return nil
}
