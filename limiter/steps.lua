-- steps: one gate of several, in the steps that together.lua puts in order. The end of `open_gate`.

local answer -- what this call gets because it was given before

return {
  limit = string.match(GATE, '{(.-)}'),
  -- Whether the gate has values, so that it can decide.
  meet = function()
    if record and call.seq < record.seq then
      answer = { '-1' }
      return true
    end
    if state.poisoned then gate.note = 'repaired=' .. healer().heal(state, now, call.birth) end
    extend_after_stall(state, now)
    if record and call.seq == record.seq then
      answer = answer_again()
      return true
    end
    return meet_gate()
  end,
  answered = function() return answer ~= nil end,
  -- What the process holds and has finished; places it may take, or nil if it was unknown.
  hear = function()
    gate.several = true
    reap()
    join()
    settle()
    roll_window()
    local cap = places()
    if gate.unknown then return nil end
    return cap
  end,
  wanted = function() return call.permits end,
  -- Whether a place may be kept for this process.
  may_keep = function() return gate.kept == 0 end,
  -- Take up to `cap`, `together` of it with the other gates. `stands`: more of those are waited for in this
  -- line; `keep_us`: for so long one place is left free for them.
  grant = function(cap, together, stands, keep_us)
    gate.together, gate.stands, gate.keep_us = together, stands, keep_us
    take(cap)
    queue_up()
    wake()
    answer = reply()
  end,
  answer = function() return answer end,
}
